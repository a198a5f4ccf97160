"""From a shortlist to probabilities: candidates, features, the posterior, a language model as judge."""
