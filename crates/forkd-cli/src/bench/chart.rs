//! A small bar chart as SVG: groups of bars side by side, with their values written on them.

use std::fmt::Write;

/// A chart of grouped bars.
#[derive(Clone, Debug)]
pub(super) struct Chart<'a> {
    /// Above the chart.
    pub(super) title: &'a str,
    /// Below the chart, a line each: the machine, the command.
    pub(super) notes: &'a [String],
    /// What the values are.
    pub(super) unit: &'a str,
    /// Names of the bars within each group.
    pub(super) series: &'a [&'a str],
    /// Name of each group and one value per series.
    pub(super) groups: &'a [(String, Vec<f64>)],
}

/// Colours that stay apart for most people and on paper.
const COLOURS: [&str; 4] = ["#9aa5b1", "#1f6feb", "#d29922", "#8957e5"];

const BAR: f64 = 34.0;
const GAP: f64 = 28.0;
const LEFT: f64 = 56.0;
const TOP: f64 = 64.0;
const HEIGHT: f64 = 220.0;
const BOTTOM: f64 = 78.0;

impl Chart<'_> {
    /// The chart as an SVG document.
    pub(super) fn svg(&self) -> String {
        let group_width = BAR * self.series.len() as f64;
        let width = (LEFT + self.groups.len() as f64 * (group_width + GAP) + GAP).max(640.0);
        let height = TOP + HEIGHT + BOTTOM;
        let top = nice_ceiling(self.groups.iter().flat_map(|(_, values)| values).fold(0.0f64, |a, &b| a.max(b)));
        let mut svg = String::new();
        let mut put = |text: String| svg.push_str(&text);
        put(format!(
            "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width:.0}\" height=\"{height:.0}\" \
             viewBox=\"0 0 {width:.0} {height:.0}\" font-family=\"sans-serif\" font-size=\"12\">\n\
             <rect width=\"100%\" height=\"100%\" fill=\"#ffffff\"/>\n\
             <text x=\"{LEFT}\" y=\"22\" font-size=\"15\" font-weight=\"bold\">{}</text>\n",
            escape(self.title)
        ));
        put(self.legend());
        put(self.axis(top, width));
        for (index, (name, values)) in self.groups.iter().enumerate() {
            let left = LEFT + GAP + index as f64 * (group_width + GAP);
            put(self.group(name, values, left, top));
        }
        for (index, note) in self.notes.iter().enumerate() {
            put(format!(
                "<text x=\"{LEFT}\" y=\"{:.0}\" font-size=\"11\" fill=\"#57606a\">{}</text>\n",
                TOP + HEIGHT + 44.0 + 15.0 * index as f64,
                escape(note)
            ));
        }
        put("</svg>\n".to_owned());
        svg
    }

    fn legend(&self) -> String {
        let mut text = String::new();
        let mut x = LEFT;
        for (index, name) in self.series.iter().enumerate() {
            let _ = writeln!(
                text,
                "<rect x=\"{x:.0}\" y=\"34\" width=\"10\" height=\"10\" fill=\"{}\"/>\
                 <text x=\"{:.0}\" y=\"43\">{}</text>\n",
                COLOURS[index % COLOURS.len()],
                x + 15.0,
                escape(name)
            );
            x += 35.0 + 6.8 * name.chars().count() as f64;
        }
        text
    }

    fn axis(&self, top: f64, width: f64) -> String {
        let mut text = String::new();
        for tick in 0..=4 {
            let value = top * f64::from(tick) / 4.0;
            let y = TOP + HEIGHT - HEIGHT * f64::from(tick) / 4.0;
            let _ = writeln!(
                text,
                "<line x1=\"{LEFT}\" y1=\"{y:.1}\" x2=\"{width:.0}\" y2=\"{y:.1}\" stroke=\"#d8dee4\"/>\
                 <text x=\"{:.0}\" y=\"{:.1}\" text-anchor=\"end\">{}</text>",
                LEFT - 6.0,
                y + 4.0,
                figure(value)
            );
        }
        let _ = writeln!(
            text,
            "<text x=\"{:.0}\" y=\"{:.0}\" text-anchor=\"end\" fill=\"#57606a\">{}</text>",
            LEFT - 6.0,
            TOP - 10.0,
            escape(self.unit)
        );
        text
    }

    fn group(&self, name: &str, values: &[f64], left: f64, top: f64) -> String {
        let mut text = String::new();
        for (index, &value) in values.iter().enumerate() {
            let x = left + index as f64 * BAR;
            let bar = if top > 0.0 { HEIGHT * value / top } else { 0.0 };
            let y = TOP + HEIGHT - bar;
            let _ = writeln!(
                text,
                "<rect x=\"{x:.1}\" y=\"{y:.1}\" width=\"{:.1}\" height=\"{bar:.1}\" fill=\"{}\"/>\
                 <text x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\" font-size=\"11\">{}</text>",
                BAR - 4.0,
                COLOURS[index % COLOURS.len()],
                x + BAR / 2.0 - 2.0,
                y - 4.0,
                figure(value)
            );
        }
        let _ = writeln!(
            text,
            "<text x=\"{:.1}\" y=\"{:.0}\" text-anchor=\"middle\">{}</text>",
            left + BAR * values.len() as f64 / 2.0,
            TOP + HEIGHT + 18.0,
            escape(name)
        );
        text
    }
}

/// Three figures.
fn figure(value: f64) -> String {
    match value {
        value if value >= 100.0 || value == 0.0 => format!("{value:.0}"),
        value if value >= 10.0 => format!("{value:.1}"),
        value => format!("{value:.2}"),
    }
}

/// The least of 1, 2, 2.5, 5 or 10 times a power of ten that is not below `value`.
fn nice_ceiling(value: f64) -> f64 {
    if value <= 0.0 {
        return 1.0;
    }
    let power = 10f64.powf(value.log10().floor());
    [1.0, 2.0, 2.5, 5.0, 10.0].into_iter().map(|step| step * power).find(|&step| step >= value).unwrap_or(value)
}

fn escape(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_value_and_name_is_on_the_chart_and_nothing_breaks_the_markup() {
        let groups = [("1".to_owned(), vec![0.5, 1.25]), ("100 <b>".to_owned(), vec![80.0, 123.0])];
        let chart = Chart {
            title: "a & b",
            notes: &["\"c\"".to_owned()],
            unit: "ms",
            series: &["floor", "forkd"],
            groups: &groups,
        };
        let svg = chart.svg();
        for text in ["a &amp; b", "&quot;c&quot;", "100 &lt;b&gt;", ">0.50<", ">1.25<", ">80.0<", ">123<", "floor"] {
            assert!(svg.contains(text), "{text} is missing in {svg}");
        }
        assert_eq!(svg.matches("<rect").count(), 1 + 2 + 4, "background, legend, bars");
    }

    #[test]
    fn axes_end_at_round_values() {
        for (value, top) in [(0.0, 1.0), (0.9, 1.0), (1.1, 2.0), (23.0, 25.0), (26.0, 50.0), (99.0, 100.0)] {
            assert_eq!(nice_ceiling(value), top);
        }
    }
}
