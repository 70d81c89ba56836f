"""blemish: visual anomaly detection that learns from normal images."""
