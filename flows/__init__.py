"""The main path, the config model, runs, studies, schedules and the command line."""
