"""The order of things: experiment, main path, schedules, reports and the command line."""
