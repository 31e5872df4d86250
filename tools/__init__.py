"""Jobs: one file a job, run by `megamf JOB` or as a script."""
