"""Every measurement of the library on one GPU, in steps of at most nine minutes; see `on_gpu.sh`."""
