"""K-FAC as a preconditioner: the plan, the schedule, and the step that distributes curvature over ranks.

plan        the rank that inverts and preconditions each block: a pure function, the same on every rank
schedule    at which steps
reduction   local statistics become global
refresh     owners invert, inverses are shared
transport   gradients travel to the ranks that precondition them, and back
state       contents of a checkpoint
kfac        the step
"""
