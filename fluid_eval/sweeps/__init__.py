"""Many runs over settings, and their accuracy/throughput frontier."""
