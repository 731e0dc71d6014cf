"""`python -m raekit`, and `torchrun --nproc-per-node N -m raekit` for several processes."""

from raekit.cli import main

main()
