"""What is trained: settings, tasks, models, the step, a rank, the driver, runs and their reports. Each is a package of its own; the
command lines
(`run`, `evaluate`, `predict`) stand here. Imports point downwards only: drive, rank, learn, report, models, runs, tasks, settings."""
