//! Guest RAM: private mappings, layers over a base, dirty pages from the page tables.
