#!/bin/sh
# SPDX-License-Identifier: Apache-2.0
# A CNI plugin that writes down how it was called and then does what <its path>.d/<verb> says.
calls=${0%/*}/calls
cat >"$calls/$$.stdin"
env >"$calls/$$.env"
action=$0.d/$CNI_COMMAND
echo "${0##*/} $CNI_COMMAND $$" >>"$calls/log"
if [ -e "$action" ]; then . "$action"; fi
