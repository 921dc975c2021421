"""A round of answers that the policy has written, as rows that are dealt like any others."""
