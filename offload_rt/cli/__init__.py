"""The command line. Commands are imported one at a time, when they are run; see `main`."""
