//! What someone perhaps meant.

/// The known name that is nearest to `given`, if any is near.
pub fn nearest<'a>(given: &str, known: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let distance = |name: &'a str| (strsim::damerau_levenshtein(given, name), name);
    // A name that shares only a letter or two is no help.
    let near = |(distance, name): &(usize, &str)| *distance <= name.len().max(given.len()) / 3;
    known.into_iter().map(distance).min().filter(near).map(|(_, name)| name)
}
