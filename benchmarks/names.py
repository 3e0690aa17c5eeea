"""What the contenders of the benchmarks of whole steps are called, in JSON and tables."""

NAIVE = "naive dense"
NAIVE_COMPILED = "naive dense, compiled"
TEACHERS = "teachers"
TEACHERS_COMPILED = "teachers, compiled"
GROUPED = "groups=T"
UNLINKED = "unlinked"
UNLINKED_PLAIN = "unlinked, not fused"
UNLINKED_UNGATED = "unlinked, ungated"
LINKED = "linked"
LINKED_PLAIN = "linked, not fused"
BASELINES = (NAIVE, NAIVE_COMPILED, TEACHERS, TEACHERS_COMPILED, GROUPED)
