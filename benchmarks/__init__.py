"""Timings side by side in one run, each with its limit; `make bench` prints them all."""
