"""Names that other packages keep to themselves: one module for each package, and what to do where a name is missing."""
