"""What it detects, beside the paper and its competitors."""
