"""YAML files become a `Config`, and a `Config` becomes YAML.

document    YAML text → plain values that know their line; includes and overrides merge
fields      values that the schema allows at a path, in words
explain     a refused value → one line that a user can act on
load        file + overrides → Config → YAML again
targets     `model` and `data`: a shipped name or `package.module:callable`
shipped     the configurations that come with the package, by name
commented   a shipped run as one commented file
reference   every key, commented; or one key explained
"""
