//! Cron against an enumerator that looks at every minute.

use jiff::civil::DateTime;
use proptest::prelude::*;

use super::*;

/// One field: what is written, and the values that it stands for; `None` for the star.
type Field = (String, Option<Vec<i8>>);

fn field(first: i8, last: i8) -> BoxedStrategy<Field> {
    let star = Just(("*".to_owned(), None));
    let one = (first..=last).prop_map(|value| (value.to_string(), Some(vec![value])));
    let list = prop::collection::vec(first..=last, 2..4).prop_map(|values| {
        let text = values.iter().map(ToString::to_string).collect::<Vec<_>>().join(",");
        (text, Some(values))
    });
    let range = (first..=last, first..=last, 1..6_i8).prop_map(|(one, other, step)| {
        let (low, high) = (one.min(other), one.max(other));
        let values = (low..=high).step_by(step.try_into().unwrap()).collect();
        (format!("{low}-{high}/{step}"), Some(values))
    });
    prop_oneof![3 => star, 2 => one, 1 => list, 1 => range].boxed()
}

/// Whether a minute matches, straight from crontab(5).
fn matches(fields: &[Field; 5], at: DateTime) -> bool {
    let has = |at: usize, value: i8| fields[at].1.as_ref().is_none_or(|values| values.contains(&value));
    let (days, weekdays) = (has(2, at.day()), has(4, at.weekday().to_sunday_zero_offset()));
    let day = match (&fields[2].1, &fields[4].1) {
        (Some(_), Some(_)) => days || weekdays,
        _ => days && weekdays,
    };
    has(0, at.minute()) && has(1, at.hour()) && has(3, at.month()) && day
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn a_line_of_cron_gives_the_minutes_that_match(
        minute in field(0, 59), hour in field(0, 23), day in field(1, 31), month in field(1, 12), weekday in field(0, 6),
        start in 0..1_000_000_i64
    ) {
        let fields = [minute, hour, day, month, weekday];
        let text = fields.iter().map(|field| field.0.as_str()).collect::<Vec<_>>().join(" ");
        let Ok(schedule) = text.parse::<Schedule>() else {
            // Only what never comes may be refused: 30 February and the like.
            prop_assert!(fields[2].1.is_some() && fields[3].1.is_some(), "{} was refused", text);
            return Ok(());
        };
        let start = 1_700_000_000 / 60 * 60 + start * 60;
        let minutes = (start..start + 90 * 86_400).step_by(60);
        let expected: Vec<i64> = minutes
            .filter(|second| {
                let at = Timestamp::from_second(*second).unwrap();
                matches(&fields, at.to_zoned(TimeZone::UTC).datetime())
            })
            .take(20)
            .collect();
        let from = Timestamp::from_second(start - 1).unwrap();
        let found: Vec<i64> =
            schedule.upcoming(from, &TimeZone::UTC).map(|at| at.as_second()).take(expected.len()).collect();
        prop_assert_eq!(&found, &expected, "{}", text);
        if expected.len() < 20 {
            let last = Timestamp::from_second(expected.last().copied().unwrap_or(start - 1)).unwrap();
            let end = Timestamp::from_second(start + 90 * 86_400).unwrap();
            prop_assert!(schedule.next_after(last, &TimeZone::UTC).is_none_or(|next| next >= end), "{}", text);
        }
    }
}
