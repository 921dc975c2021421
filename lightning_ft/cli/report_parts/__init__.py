"""The parts of ``lightning-ft report``: what is read from a run's folder, charts, panels and the page."""
