"""Energy: meters that read watts or joules, and the ledger that says what they were spent on."""
