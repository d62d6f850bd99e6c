# SPDX-License-Identifier: Apache-2.0
"""The gRPC edge: proto in, proto out, no decisions. Only this package and `server` know gRPC."""
