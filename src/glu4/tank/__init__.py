"""The Shark Tank: rounds of proposed optimisations, judged by the specification and the clock, and kept in a ledger."""
