"""What methods are made of: schema, measures, selection, masks, election, spectra."""
