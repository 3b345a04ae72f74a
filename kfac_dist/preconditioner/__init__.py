"""K-FAC as a preconditioner: what is planned, when it runs, and the step that ties curvature to ranks.

plan        who measures, reduces, inverts and preconditions what: a pure function, the same on every rank
schedule    at which steps
reduction   local statistics become global
refresh     owners invert, inverses are shared
transport   gradients reach who preconditions them, and come back
state       what a checkpoint holds
kfac        the step
"""
