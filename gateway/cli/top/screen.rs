//! Figures drawn on whatever room there is.

use foregate_api::member::Phase;
use ratatui::Frame;
use ratatui::layout::{Constraint, Layout, Rect};
use ratatui::style::{Color, Modifier, Style};
use ratatui::text::{Line, Span};
use ratatui::widgets::{Block, Paragraph};

use super::Shown;
use super::figures::{Figures, RankFigures, mean};
use super::state::State;

/// Loads over the mean from which a cell is hotter.
const HEAT: [f64; 7] = [0.125, 0.5, 0.8, 1.25, 2.0, 3.0, 5.0];
/// One more than the bounds: from cold to hot, to be told apart without colours too.
const CELLS: [char; 8] = ['.', ':', '-', '=', '+', 'x', '#', '@'];
const COLOURS: [Color; 8] = [
    Color::DarkGray,
    Color::Blue,
    Color::Cyan,
    Color::Green,
    Color::Yellow,
    Color::LightYellow,
    Color::LightRed,
    Color::Red,
];
/// Columns before the first cell of the heat map: layer and imbalance before and after.
const MARGIN: u16 = 18;
/// Rows of what is told of the chosen layer.
const HOT: u16 = 5;

/// Draws everything. What was scrolled to beyond the end is brought back.
pub(super) fn draw(frame: &mut Frame<'_>, shown: &Shown, state: &mut State) {
    let Some(figures) = &shown.figures else {
        frame.render_widget(Paragraph::new("waiting for the gateway"), frame.area());
        return;
    };
    let ranks = u16::try_from(figures.ranks.len()).unwrap_or(u16::MAX);
    let [head, ranks, heat, hot, last, keys] = Layout::vertical([
        Constraint::Length(2),
        Constraint::Length(ranks.saturating_add(2).min(frame.area().height / 3)),
        Constraint::Fill(1),
        Constraint::Length(HOT),
        Constraint::Length(2),
        Constraint::Length(1),
    ])
    .areas(frame.area());
    frame.render_widget(Paragraph::new(header(figures, shown)), head);
    draw_ranks(frame, ranks, figures);
    draw_heat(frame, heat, figures, state);
    draw_hot(frame, hot, figures, state.layer);
    frame.render_widget(Paragraph::new(change(shown)), last);
    let help = "q quit  up/down layer  left/right experts  home/end first/last layer";
    let dim = Style::new().add_modifier(Modifier::DIM);
    frame.render_widget(Paragraph::new(Span::styled(help, dim)), keys);
}

fn header(figures: &Figures, shown: &Shown) -> Vec<Line<'static>> {
    let snapshot = &figures.snapshot;
    let epoch = |plan: &Option<foregate_api::placement::Placement>| {
        plan.as_ref()
            .map_or_else(|| "-".to_owned(), |plan| plan.epoch.to_string())
    };
    let (active, target) = (epoch(&snapshot.active), epoch(&snapshot.target));
    let moving = if active == target {
        format!("epoch {active}")
    } else {
        format!("epoch {active} -> {target}")
    };
    let first = format!(
        "foregate top  {moving}  {} ranks  {} x {} experts  {:.0} tokens/s",
        figures.ranks.len(),
        snapshot.layers,
        snapshot.experts,
        figures.tokens
    );
    let second = match &shown.trouble {
        Some(trouble) => Line::styled(trouble.clone(), Style::new().fg(Color::Red)),
        None => Line::raw(format!(
            "most/mean load  before the split {:.3}  after {:.3}{}",
            mean(&figures.before_split),
            mean(&figures.after_split),
            if snapshot.connected {
                ""
            } else {
                "  STORE AWAY"
            }
        )),
    };
    vec![
        Line::styled(first, Style::new().add_modifier(Modifier::BOLD)),
        second,
    ]
}

fn draw_ranks(frame: &mut Frame<'_>, area: Rect, figures: &Figures) {
    let room = usize::from(area.height.saturating_sub(2));
    let shown = figures.ranks.len().min(room);
    let title = if shown < figures.ranks.len() {
        format!(" hottest {shown} of {} ranks ", figures.ranks.len())
    } else {
        " ranks ".to_owned()
    };
    let mut ranks: Vec<&RankFigures> = figures.ranks.iter().collect();
    if shown < ranks.len() {
        ranks.sort_by(|a, b| b.over_mean.total_cmp(&a.over_mean));
    }
    let width = usize::from(area.width.saturating_sub(2));
    let lines: Vec<Line<'_>> = ranks
        .into_iter()
        .take(room)
        .map(|rank| line(rank, width))
        .collect();
    frame.render_widget(
        Paragraph::new(lines).block(Block::bordered().title(title)),
        area,
    );
}

fn line(rank: &RankFigures, width: usize) -> Line<'static> {
    let phase = match rank.phase {
        Some(Phase::Ready) => "ready",
        Some(Phase::Joining) => "joining",
        Some(Phase::Draining) => "draining",
        None => "gone",
    };
    let loads = match rank.loads {
        Some((0, _)) | None => String::new(),
        Some((copies, true)) => format!(" +{copies} here"),
        Some((copies, false)) => format!(" +{copies} due"),
    };
    let text = format!(
        "{:>4} {phase:<8} {:>5.2} {} run {:>3} wait {:>3} kv {:>3.0}% {:>5.0} t/s{loads}",
        rank.rank,
        rank.over_mean,
        bar(rank.over_mean, width.saturating_sub(64).clamp(8, 40)),
        rank.running,
        rank.waiting,
        100.0 * rank.kv,
        rank.tokens
    );
    Line::styled(text, Style::new().fg(colour(rank.over_mean)))
}

/// A bar that is half full at the mean.
fn bar(over_mean: f64, width: usize) -> String {
    let full = (over_mean * width as f64 / 2.0).round().max(0.0) as usize;
    let full = full.min(width);
    format!("{}{}", "|".repeat(full), " ".repeat(width - full))
}

fn draw_heat(frame: &mut Frame<'_>, area: Rect, figures: &Figures, state: &mut State) {
    let (layers, experts) = (figures.snapshot.layers, figures.snapshot.experts);
    let room = usize::from(area.height.saturating_sub(2));
    let columns = usize::from(area.width.saturating_sub(MARGIN + 2)).min(experts);
    state.layer = state.layer.min(layers.saturating_sub(1));
    state.first = state.first.min(experts.saturating_sub(columns));
    // The chosen layer stays in sight.
    let top = state.layer.saturating_sub(room.saturating_sub(1));
    let title = if columns < experts {
        let last = state.first + columns - 1;
        format!(
            " rows per expert {}-{last} of {experts} over the mean ",
            state.first
        )
    } else {
        " rows per expert over the mean ".to_owned()
    };
    let lines: Vec<Line<'_>> = (top..layers.min(top + room))
        .map(|layer| {
            let figure = |of: &[f64]| of.get(layer).copied().unwrap_or(1.0);
            let margin = format!(
                "{}{layer:>3} {:>5.2} {:>5.2}  ",
                if layer == state.layer { '>' } else { ' ' },
                figure(&figures.before_split),
                figure(&figures.after_split)
            );
            let mut spans = vec![Span::raw(margin)];
            let cells = figures
                .heat(layer)
                .into_iter()
                .skip(state.first)
                .take(columns);
            spans.extend(cells.map(|over| {
                Span::styled(
                    CELLS[level(over)].to_string(),
                    Style::new().fg(colour(over)),
                )
            }));
            Line::from(spans)
        })
        .collect();
    frame.render_widget(
        Paragraph::new(lines).block(Block::bordered().title(title)),
        area,
    );
}

fn draw_hot(frame: &mut Frame<'_>, area: Rect, figures: &Figures, layer: usize) {
    let heat = figures.heat(layer);
    let mut hottest: Vec<usize> = (0..heat.len()).collect();
    hottest.sort_by(|a, b| heat[*b].total_cmp(&heat[*a]).then(a.cmp(b)));
    let room = usize::from(area.height.saturating_sub(2));
    let lines: Vec<Line<'_>> = hottest
        .into_iter()
        .take(room)
        .map(|expert| {
            let copies = figures
                .layer(layer)
                .and_then(|plan| plan.copies.get(expert))
                .map_or(&[][..], Vec::as_slice);
            let homes: Vec<String> = copies
                .iter()
                .map(|copy| format!("{} ({:.0}%)", copy.rank, 100.0 * copy.share))
                .collect();
            Line::styled(
                format!(
                    "expert {expert:>4} {:>5.2}  on {}",
                    heat[expert],
                    homes.join(", ")
                ),
                Style::new().fg(colour(heat[expert])),
            )
        })
        .collect();
    let title = format!(" hottest experts of layer {layer}, and their copies ");
    frame.render_widget(
        Paragraph::new(lines).block(Block::bordered().title(title)),
        area,
    );
}

fn change(shown: &Shown) -> Vec<Line<'static>> {
    let Some((record, now_ms)) = &shown.last else {
        return vec![Line::raw("no change is recorded yet")];
    };
    let (is, was) = (&record.measured, &record.predicted);
    let ago = now_ms.saturating_sub(record.at_ms) / 1000;
    let balance = |figure: Option<f64>| {
        figure.map_or_else(|| "?".to_owned(), |balance| format!("{balance:.3}"))
    };
    let reason = record
        .reason
        .map_or("keep", foregate_api::placement::Reason::name);
    vec![
        Line::raw(format!(
            "last change: epoch {} ({reason}) {ago} s ago, {} copies, {} bytes",
            record.epoch, was.cost.copies, was.cost.bytes
        )),
        Line::raw(format!(
            "balance predicted {:.3} -> {:.3}, measured {} -> {}, stall {}",
            was.balance_before,
            was.balance_after,
            balance(is.balance_before),
            balance(is.balance_after),
            is.stall_us
                .map_or_else(|| "?".to_owned(), |us| format!("{us} us"))
        )),
    ]
}

fn level(over_mean: f64) -> usize {
    HEAT.iter().filter(|bound| over_mean >= **bound).count()
}

fn colour(over_mean: f64) -> Color {
    COLOURS[level(over_mean)]
}
