# SPDX-License-Identifier: Apache-2.0
"""Real things to stand up: a registry with a test image, a pod network, a server on temporary
folders.

The tests, the demonstration (`deploy/demo.py`) and the benchmark (`bench/`) share them. Each is a
context manager that takes away all that it made, whatever happened in between; none needs a crash
to be survived.
"""
