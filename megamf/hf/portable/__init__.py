"""The self-contained modelling files that exports carry for `trust_remote_code`; they need torch and transformers."""
