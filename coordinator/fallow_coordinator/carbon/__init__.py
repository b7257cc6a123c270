"""Grams of CO₂ for each kWh, by region and hour: the operator's file or a synthetic default."""
