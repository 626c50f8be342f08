"""What both packages use that is no noun: errors, units, files, tables, signals, processes."""
