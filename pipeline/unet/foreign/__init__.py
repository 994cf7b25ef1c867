"""Networks from elsewhere: read, measured, run, and packaged for others. No code of theirs runs unless trusted."""
