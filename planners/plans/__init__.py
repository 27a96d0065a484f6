"""What a plan is: data, checked, and written as JSON."""
