"""Configurations: each file's header gives its command, hardware, time and result."""
