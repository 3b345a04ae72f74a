"""Private names of other packages: one module for each package, with alternatives for releases that lack a name."""
