//! What is looked at, and what keys do. Pure.

use ratatui::crossterm::event::{Event, KeyCode, KeyEventKind, KeyModifiers};

/// Experts that a sideways step passes.
const STEP: usize = 8;

/// Whether to go on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Next {
    Go,
    Quit,
}

/// What is looked at. Bounds are those of the screen, which corrects what is beyond them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(super) struct State {
    /// The layer.
    pub(super) layer: usize,
    /// The first expert of the heat map.
    pub(super) first: usize,
}

impl State {
    /// Takes in an event of the terminal.
    pub(super) fn on(&mut self, event: &Event) -> Next {
        let Event::Key(key) = event else {
            return Next::Go; // Another size: it is drawn anew.
        };
        if key.kind == KeyEventKind::Release {
            return Next::Go;
        }
        match key.code {
            KeyCode::Char('q') | KeyCode::Esc => return Next::Quit,
            KeyCode::Char('c') if key.modifiers.contains(KeyModifiers::CONTROL) => {
                return Next::Quit;
            }
            KeyCode::Down | KeyCode::Char('j') => self.layer = self.layer.saturating_add(1),
            KeyCode::Up | KeyCode::Char('k') => self.layer = self.layer.saturating_sub(1),
            KeyCode::Home | KeyCode::Char('g') => self.layer = 0,
            KeyCode::End | KeyCode::Char('G') => self.layer = usize::MAX,
            KeyCode::Right | KeyCode::Char('l') => self.first = self.first.saturating_add(STEP),
            KeyCode::Left | KeyCode::Char('h') => self.first = self.first.saturating_sub(STEP),
            _ => {}
        }
        Next::Go
    }
}
