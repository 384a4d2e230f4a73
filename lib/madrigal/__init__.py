"""Storage drivers for OpenNebula-style clouds, and the toolkit to write more of them.

`from madrigal import log, error_message, arg_host, arg_path, exec_and_log, ssh_exec_and_log,
timeout_exec_and_log` gives what driver authors know from scripts_common.sh; docs/writing-a-driver.md.
"""

import sys

if sys.version_info < (3, 11):  # before anything that an older Python cannot even read
    from madrigal.interpreter import change

    change()

__version__ = "0.1.0"

_NAMES = {
    "log": "messages",
    "log_info": "messages",
    "log_error": "messages",
    "log_debug": "messages",
    "error_message": "messages",
    "arg_host": "location",
    "arg_path": "location",
    "fix_dir_slashes": "location",
    "exec_and_log": "author",
    "timeout_exec_and_log": "author",
    "ssh_exec_and_log": "author",
}

__all__ = ["arg_host", "arg_path", "error_message", "exec_and_log", "fix_dir_slashes", "log", "log_debug"]
__all__ += ["log_error", "log_info", "ssh_exec_and_log", "timeout_exec_and_log"]

TYPE_CHECKING = False
if TYPE_CHECKING:
    from madrigal.author import exec_and_log, ssh_exec_and_log, timeout_exec_and_log
    from madrigal.location import arg_host, arg_path, fix_dir_slashes
    from madrigal.messages import error_message, log, log_debug, log_error, log_info
else:

    def __getattr__(name):
        # On first use: an action that only logs does not pay for running programs.
        if name in _NAMES:
            import importlib

            return getattr(importlib.import_module("madrigal." + _NAMES[name]), name)
        raise AttributeError(name)
