"""Shodh: sparse mixture-of-experts foundation models of 3-D physics that conserve mass exactly."""
