"""From raw text to tokens: reads, cleans, filters, de-duplicates and audits documents, in units that any number of workers share."""
