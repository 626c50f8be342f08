"""Model, strategy and stack -> Workload: ops with stream, work, dependencies and memory."""

from mopsim.program.lower import lower as lower
