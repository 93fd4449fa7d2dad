//! Plots as inline SVG. Colours are the page's, by class, so that they follow its light and dark forms.
//!
//! A plot is 360 units wide: at that width its text has the page's size, on a telephone and beside another
//! plot alike.

use std::fmt::Write;

const WIDTH: f64 = 360.0;
const HEIGHT: f64 = 228.0;
const LEFT: f64 = 46.0;
const RIGHT: f64 = 10.0;
const TOP: f64 = 34.0;
const BOTTOM: f64 = 38.0;

/// Values that belong together.
pub struct Series {
    pub name: String,
    /// For each place on the x axis the value, and the least and greatest that it was made of.
    pub values: Vec<Option<Value>>,
}

/// A value with its spread.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Value {
    pub at: f64,
    pub least: f64,
    pub most: f64,
}

impl Value {
    /// The mean of what several runs gave.
    pub fn of(values: impl Iterator<Item = f64> + Clone) -> Option<Self> {
        let count = values.clone().count();
        let at = values.clone().sum::<f64>() / count as f64;
        let least = values.clone().fold(f64::INFINITY, f64::min);
        let most = values.fold(f64::NEG_INFINITY, f64::max);
        (count > 0).then_some(Self { at, least, most })
    }
}

/// How the values are drawn.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    Bars,
    Lines,
}

/// A plot of one or more series over the same places.
pub struct Chart {
    pub form: Form,
    /// What the values are, with their unit.
    pub y: String,
    pub x: String,
    pub places: Vec<String>,
    pub series: Vec<Series>,
    /// A value that should not be exceeded, and what it is.
    pub limit: Option<(f64, String)>,
}

/// A number with as many digits as are worth reading.
pub fn number(value: f64) -> String {
    let digits = match value.abs() {
        v if v == 0.0 || v >= 100.0 => 0,
        v if v >= 10.0 => 1,
        v if v >= 0.1 => 2,
        _ => 3,
    };
    let text = format!("{value:.digits$}");
    match text.split_once('.') {
        Some(_) => text.trim_end_matches('0').trim_end_matches('.').to_owned(),
        None => grouped(&text),
    }
}

/// The same for a mark in a plot, where there is little room.
fn short(value: f64) -> String {
    match value.abs() {
        v if v >= 10.0 => number(value.round()),
        v if v >= 1.0 => number((value * 10.0).round() / 10.0),
        _ => number(value),
    }
}

/// Digits in groups of three, from 10,000 on.
fn grouped(digits: &str) -> String {
    if digits.len() < 5 {
        return digits.to_owned();
    }
    let mut out = String::new();
    for (at, digit) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out
}

/// Text that may stand in HTML.
pub fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;").replace('"', "&quot;")
}

/// The step between grid lines, and the top of the axis: at most five steps of 1, 2 or 5.
fn axis(most: f64) -> (f64, f64) {
    let most = if most > 0.0 { most } else { 1.0 };
    let power = 10_f64.powf((most / 5.0).log10().floor());
    let step = [1.0, 2.0, 5.0, 10.0].into_iter().map(|step| step * power);
    let step = step.into_iter().find(|step| most / step <= 5.0).unwrap_or(most);
    (step, (most / step).ceil() * step)
}

impl Chart {
    fn values(&self) -> impl Iterator<Item = Value> {
        self.series.iter().flat_map(|series| series.values.iter().copied().flatten())
    }

    fn top(&self) -> (f64, f64) {
        let limit = self.limit.as_ref().map_or(0.0, |(limit, _)| *limit);
        axis(self.values().map(|value| value.most).fold(limit, f64::max))
    }

    /// The middle of a place.
    fn x(&self, place: usize) -> f64 {
        let each = (WIDTH - LEFT - RIGHT) / self.places.len().max(1) as f64;
        LEFT + each * (place as f64 + 0.5)
    }

    pub fn svg(&self) -> String {
        let (step, top) = self.top();
        let y = |value: f64| HEIGHT - BOTTOM - (HEIGHT - BOTTOM - TOP) * value / top;
        let mut out = format!(
            "<svg viewBox=\"0 0 {WIDTH} {HEIGHT}\" role=\"img\" aria-label=\"{} by {}\">\n",
            escaped(&self.y),
            escaped(&self.x)
        );
        let _ = writeln!(out, "<text class=\"axis\" x=\"4\" y=\"11\">{}</text>", escaped(&self.y));
        let mut value = 0.0;
        while value <= top + step / 2.0 {
            let (line, text) = (y(value), y(value) + 3.5);
            let _ = writeln!(
                out,
                "<line class=\"grid\" x1=\"{LEFT}\" x2=\"{:.1}\" y1=\"{line:.1}\" y2=\"{line:.1}\"/>\
                 <text class=\"tick\" x=\"{:.1}\" y=\"{text:.1}\" text-anchor=\"end\">{}</text>",
                WIDTH - RIGHT,
                LEFT - 5.0,
                number(value)
            );
            value += step;
        }
        for (place, name) in self.places.iter().enumerate() {
            let _ = writeln!(
                out,
                "<text class=\"tick\" x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{}</text>",
                self.x(place),
                HEIGHT - BOTTOM + 14.0,
                escaped(name)
            );
        }
        let _ = writeln!(
            out,
            "<text class=\"axis\" x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{}</text>",
            (LEFT + WIDTH - RIGHT) / 2.0,
            HEIGHT - 7.0,
            escaped(&self.x)
        );
        match self.form {
            Form::Bars => self.bars(&mut out, &y),
            Form::Lines => self.lines(&mut out, &y),
        }
        if let Some((limit, what)) = &self.limit {
            let at = y(*limit);
            let _ = writeln!(
                out,
                "<line class=\"limit\" x1=\"{LEFT}\" x2=\"{:.1}\" y1=\"{at:.1}\" y2=\"{at:.1}\"/>\
                 <text class=\"note\" x=\"{:.1}\" y=\"{:.1}\">{}</text>",
                WIDTH - RIGHT,
                LEFT + 4.0,
                at - 4.0,
                escaped(what)
            );
        }
        out + "</svg>\n"
    }

    fn bars(&self, out: &mut String, y: &dyn Fn(f64) -> f64) {
        let each = (WIDTH - LEFT - RIGHT) / self.places.len().max(1) as f64;
        let wide = (each * 0.72 / self.series.len().max(1) as f64).min(34.0);
        for (index, series) in self.series.iter().enumerate() {
            let shift = wide * (index as f64 - self.series.len() as f64 / 2.0);
            for (place, value) in series.values.iter().enumerate() {
                let Some(value) = value else { continue };
                let (left, high) = (self.x(place) + shift, y(value.at));
                let _ = writeln!(
                    out,
                    "<rect class=\"s{index}\" x=\"{:.1}\" y=\"{high:.1}\" width=\"{:.1}\" height=\"{:.1}\">\
                     <title>{}: {}</title></rect>",
                    left + 0.5,
                    wide - 1.0,
                    (y(0.0) - high).max(0.5),
                    escaped(&series.name),
                    number(value.at)
                );
                self.spread(out, left + wide / 2.0, *value, y);
                let _ = writeln!(
                    out,
                    "<text class=\"value\" x=\"{:.1}\" y=\"{:.1}\" text-anchor=\"middle\">{}</text>",
                    left + wide / 2.0,
                    y(value.most) - 4.0,
                    short(value.at)
                );
            }
        }
    }

    fn lines(&self, out: &mut String, y: &dyn Fn(f64) -> f64) {
        for (index, series) in self.series.iter().enumerate() {
            // Two lines may lie close together; so may a line and its limit.
            let is_below = index + 1 < self.series.len() || self.limit.is_some();
            let points = series.values.iter().enumerate();
            let points: Vec<(f64, Value)> =
                points.filter_map(|(place, value)| Some((self.x(place), (*value)?))).collect();
            let line: Vec<String> =
                points.iter().map(|(x, value)| format!("{x:.1},{:.1}", y(value.at))).collect();
            let _ = writeln!(out, "<polyline class=\"s{index}\" points=\"{}\"/>", line.join(" "));
            for (x, value) in points {
                self.spread(out, x, value, y);
                let text = if is_below { y(value.least) + 14.0 } else { y(value.most) - 6.0 };
                // What has no room below stands beside its point, not on the axis.
                let is_low = text > HEIGHT - BOTTOM;
                let (left, text) =
                    if is_low { (x + 6.0, HEIGHT - BOTTOM - 3.0) } else { (x, text) };
                let anchor = if is_low { "start" } else { "middle" };
                let _ = writeln!(
                    out,
                    "<circle class=\"s{index}\" cx=\"{x:.1}\" cy=\"{:.1}\" r=\"3\">\
                     <title>{}: {}</title></circle>\
                     <text class=\"value\" x=\"{left:.1}\" y=\"{text:.1}\" text-anchor=\"{anchor}\">{}</text>",
                    y(value.at),
                    escaped(&series.name),
                    number(value.at),
                    if value.at < 10.0 { number(value.at) } else { short(value.at) }
                );
            }
        }
    }

    /// From the least to the greatest of the runs, if they differ visibly.
    fn spread(&self, out: &mut String, x: f64, value: Value, y: &dyn Fn(f64) -> f64) {
        let (low, high) = (y(value.least), y(value.most));
        if low - high > 1.0 {
            let _ = writeln!(
                out,
                "<line class=\"spread\" x1=\"{x:.1}\" x2=\"{x:.1}\" y1=\"{high:.1}\" y2=\"{low:.1}\"/>"
            );
        }
    }

    /// Which colour is what; empty if there is only one.
    pub fn legend(&self) -> String {
        if self.series.len() < 2 {
            return String::new();
        }
        let items = self.series.iter().enumerate().map(|(index, series)| {
            format!("<span><i class=\"s{index}\"></i>{}</span>", escaped(&series.name))
        });
        format!("<p class=\"legend\">{}</p>\n", items.collect::<String>())
    }

    /// The same as a table.
    pub fn table(&self) -> String {
        let mut out = format!("<table><thead><tr><th>{}</th>", escaped(&self.x));
        for series in &self.series {
            let _ = write!(out, "<th>{}</th>", escaped(&series.name));
        }
        out.push_str("</tr></thead><tbody>");
        for (place, name) in self.places.iter().enumerate() {
            let _ = write!(out, "<tr><td>{}</td>", escaped(name));
            for series in &self.series {
                let value = series.values.get(place).copied().flatten();
                let text = value.map_or_else(|| "–".to_owned(), |value| number(value.at));
                let _ = write!(out, "<td>{text}</td>");
            }
            out.push_str("</tr>");
        }
        out + "</tbody></table>\n"
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_and_axes_are_round() {
        let texts = [0.0, 0.0123, 0.5, 3.0, 3.456, 51.26, 128.4, 12_345.6].map(number);
        assert_eq!(texts, ["0", "0.012", "0.5", "3", "3.46", "51.3", "128", "12,346"]);
        for (most, step, top) in
            [(0.7, 0.2, 0.8), (5.0, 1.0, 5.0), (54.5, 20.0, 60.0), (1001.0, 500.0, 1500.0)]
        {
            let (got_step, got_top) = axis(most);
            assert!((got_step - step).abs() < 1e-9 && (got_top - top).abs() < 1e-9, "{most}");
        }
        assert_eq!(axis(0.0).1, 1.0);
    }

    #[test]
    fn a_chart_has_a_mark_for_each_value_and_escapes_its_words() {
        let value = |at| Value::of([at, at + 2.0].into_iter());
        let series =
            |name: &str| Series { name: name.into(), values: vec![value(1.0), None, value(3.0)] };
        let places = ["a", "b", "<c>"].map(String::from).to_vec();
        let chart = Chart {
            form: Form::Bars,
            y: "seconds".into(),
            x: "nodes".into(),
            places,
            series: vec![series("one"), series("two")],
            limit: Some((9.0, "bound".into())),
        };
        let svg = chart.svg();
        assert_eq!(svg.matches("<rect").count(), 4);
        assert!(svg.contains("&lt;c&gt;") && !svg.contains("<c>") && svg.contains("bound"));
        assert_eq!(Chart { form: Form::Lines, ..chart }.svg().matches("<circle").count(), 4);
    }

    #[test]
    fn no_value_of_a_line_stands_on_the_axis() {
        let series = |name: &str, at: f64| Series {
            name: name.into(),
            values: vec![Value::of([at].into_iter())],
        };
        let chart = Chart {
            form: Form::Lines,
            y: "seconds".into(),
            x: "nodes".into(),
            places: vec!["10".into()],
            series: vec![series("half", 0.003), series("most", 0.9)],
            limit: None,
        };
        let svg = chart.svg();
        let low = svg.lines().find(|line| line.ends_with(">0.003</text>")).unwrap();
        let at = |key: &str| -> f64 {
            let text = low.rsplit_once("<text").unwrap().1;
            text.split_once(key).unwrap().1.split('"').next().unwrap().parse().unwrap()
        };
        assert!(at(" y=\"") < HEIGHT - BOTTOM && at(" x=\"") > chart.x(0), "{low}");
    }
}
