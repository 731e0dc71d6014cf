"""What all studies share: plans, execution, intervals and reports."""
