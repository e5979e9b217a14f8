"""Every limit on time, memory and text, once. A busy machine is nobody's hang: seconds are a process's own, without its
waits for a processor.
"""

# What the judge waits for before it calls a check a hang, and an exercise's checks of one kind together.
HANG_SECONDS = 10.0
SLOW_SECONDS = 2.0
SHARD_SECONDS = 100.0
# mypy without its cache; an own test that hangs on each of ten slips.
KIND_SECONDS = {"ruff": 30.0, "mypy": 150.0, "own test": 60.0, "code": HANG_SECONDS}
# A device may take long to come up.
DEVICE_SECONDS = 60.0
# Plain pytest has no supervisor: what no signal can interrupt ends the run this much later.
GRACE_SECONDS = 20.0

# An own test: what is asked of it on right code, when it hangs there, and when a slip makes it hang.
OWN_TEST_SECONDS = 1.0
OWN_TEST_HANG_SECONDS = 5.0
SLIP_HANG_SECONDS = 2.0
LOAD_SECONDS = 10.0

MYPY_SECONDS = 120.0
MYPY_DAEMON_SECONDS = 5.0
MYPY_DAEMON_IDLE_SECONDS = 7200

# How far own test and mypy stand back behind the code's checks, as `nice` counts.
LATER = 15
# A worker's address space, and the largest file that it may write.
MEMORY_BYTES = 12 << 30
OUTPUT_BYTES = 16 << 20
# A submission's file, and a message that quotes what it says.
FILE_BYTES = 1_000_000
MESSAGE_LINES, LINE_CHARACTERS = 12, 500
