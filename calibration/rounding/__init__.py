"""From statistics to integers: rounding, balancing, bit allocation, tuning."""
