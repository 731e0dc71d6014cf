"""Experiments made of trainings: the demo, and studies of the paper's claims."""
