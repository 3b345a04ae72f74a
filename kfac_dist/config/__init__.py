"""The schema of a run's configuration (`schema`), and its sources: YAML files, includes, the command line (`load`).

document    YAML text → plain values that know their line; includes and overrides merge
fields      values that the schema allows at a path, in words
explain     a refused value → one line that a user can act on
load        file + overrides → Config → YAML again
targets     `model` and `data`: a shipped name or `package.module:callable`
schedules   the value of a scheduled quantity at a step
"""
