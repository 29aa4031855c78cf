"""RaPTr (arXiv 2402.05913): in each step a random path of layers, longer from stage to stage.

As many layers are skipped in each step of a stage; here in four equal stages down to none. The
first and the last layer always run.
"""

from sts.lds import Policy

POLICY = Policy(schedule="falling_staged", draw="fixed_count", protect_first=1, protect_last=1)
