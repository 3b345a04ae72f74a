"""The cost of K-FAC on other numbers of ranks, by other strategies and on other machines, before anything runs.

PlannedRun      a model's shapes, a configuration and W: the same plan that ranks make at start-up      job.py
record_traffic  a rank's collectives in one kind of step, recorded, not sent                            traffic.py
Hardware        costs of products, inversions and messages: a profile, or measured by `calibrate`      hardware.py
predict         both together: milliseconds added to a step, and where they go                         prediction.py
strategies      the grid that is compared                                                              strategies.py
view            the table, the bottlenecks and the recommendation as YAML                              table.py
"""
