"""Factor algebra on plain tensors: decompositions, spectra, growth. No noun of rankflow's in it."""
