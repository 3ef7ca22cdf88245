"""Where images come from, and in which order: functions of position alone."""
