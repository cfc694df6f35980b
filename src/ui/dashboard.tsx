/**
 * The dashboard of `b2 watch` on a terminal. {@link Dashboard} draws one {@link DashboardView}; {@link showDashboard} runs it full-screen.
 * Loaded only when it is shown: React and ink cost other commands nothing.
 */
import { Box, Text, render, useInput, useStdin, useStdout } from 'ink';
import { useEffect, useState, type ReactElement } from 'react';
import { formatBytes, formatDuration } from '../human.js';
import {
  ageText,
  deviceColumns,
  fit,
  lagText,
  moodOf,
  rateText,
  shareRows,
  sparkline,
  stateText,
  type DashboardAlarm,
  type DashboardDevice,
  type DashboardPoint,
  type DashboardView,
  type DeviceColumns,
  type Mood,
} from './dashboard-view.js';

export interface DashboardActions {
  /** A snapshot of the device with this index, now. */
  readonly snapshot: (index: number) => void;
  /** The end, with a last point. */
  readonly quit: () => void;
  /** Ctrl-C. */
  readonly interrupt: () => void;
}

export interface DashboardProps {
  readonly view: DashboardView;
  readonly actions: DashboardActions;
  readonly colour: boolean;
  /** Size of the terminal where it is not that of stdout (tests). */
  readonly size?: { readonly columns: number; readonly rows: number };
}

const COLOURS: Readonly<Record<Mood, string>> = { good: 'green', busy: 'yellow', bad: 'red' };

interface PaintProps {
  readonly text: string;
  readonly colour?: string | undefined;
  readonly bold?: boolean;
  readonly dim?: boolean;
  /** False: neither colours nor weights. */
  readonly on: boolean;
}

/** Text in a colour and weight, or plain where nobody wants them. */
function Paint({ text, colour, bold, dim, on }: PaintProps): ReactElement {
  if (!on) return <Text>{text}</Text>;
  return (
    <Text
      bold={bold === true}
      dimColor={dim === true}
      {...(colour === undefined ? {} : { color: colour })}
    >
      {text}
    </Text>
  );
}

function useTerminalSize(given: DashboardProps['size']): { columns: number; rows: number } {
  const { stdout } = useStdout();
  const measure = (): { columns: number; rows: number } => ({
    columns: given?.columns ?? stdout.columns ?? 80,
    rows: given?.rows ?? stdout.rows ?? 24,
  });
  const [size, setSize] = useState(measure);
  useEffect(() => {
    const resized = (): void => setSize(measure());
    stdout.on('resize', resized);
    return () => {
      stdout.off('resize', resized);
    };
  });
  return size;
}

interface DeviceLineProps {
  readonly device: DashboardDevice;
  readonly columns: DeviceColumns;
  readonly isSelected: boolean;
  readonly intervalMs: number;
  readonly colour: boolean;
}

function DeviceLine({
  device: d,
  columns: c,
  isSelected,
  intervalMs,
  colour,
}: DeviceLineProps): ReactElement {
  const mood = moodOf(d, intervalMs);
  const right = { align: 'right' } as const;
  return (
    <Text wrap="truncate">
      <Paint
        on={colour}
        bold={isSelected}
        text={`${isSelected ? '>' : ' '} ${fit(d.name, c.name, { keepEnd: true })} `}
      />
      <Paint on={colour} colour={COLOURS[mood]} text={`${fit(stateText(d), c.state)} `} />
      <Paint on={colour} text={`${fit(lagText(d.lagMs), c.lag, right)} `} />
      <Paint on={colour} colour="cyan" text={`${sparkline(d.lagHistory, c.spark, intervalMs)} `} />
      <Paint
        on={colour}
        text={[d.writtenBytesPerSecond, d.capturedBytesPerSecond, d.storedBytesPerSecond]
          .map((rate) => fit(rateText(rate), c.rate, right))
          .join(' ')}
      />
    </Text>
  );
}

function PointLine({
  point: p,
  nameWidth,
  colour,
}: {
  readonly point: DashboardPoint;
  readonly nameWidth: number;
  readonly colour: boolean;
}): ReactElement {
  return (
    <Text wrap="truncate">
      <Paint
        on={colour}
        text={`  ${p.time}  ${fit(p.id, 8)} ${fit(p.device, nameWidth, { keepEnd: true })} `}
      />
      <Paint on={colour} text={`${fit(p.class, 6)} `} />
      <Paint
        on={colour}
        colour={p.coverage === 'exact' ? undefined : 'yellow'}
        text={fit(p.coverage, 10)}
      />
      <Paint
        on={colour}
        dim
        text={`${fit(formatBytes(p.storedBytes), 10, { align: 'right' })}, after ${ageText(p.ageMs)}`}
      />
    </Text>
  );
}

function AlarmLine({
  alarm,
  colour,
}: {
  readonly alarm: DashboardAlarm;
  readonly colour: boolean;
}): ReactElement {
  return (
    <Text wrap="truncate">
      <Paint on={colour} text={`  ${alarm.time}  `} />
      <Paint on={colour} colour="red" text={fit(alarm.message, 4096).trimEnd()} />
    </Text>
  );
}

/** At most 78 columns, at most 18 lines: it fits the smallest terminal. */
const HELP: readonly string[] = [
  's    a snapshot of the selected device, now: pinned, of the best class there is',
  '↑ ↓  select a device',
  'q    a last point of every device, then the end (Ctrl-C does the same)',
  '?    this help; any key closes it',
  '',
  'LAG       the age of the oldest write that no durable point holds: what a',
  '          disaster now would cost. HISTORY has a bar a second; each step is',
  '          twice the lag, the full bar eight intervals, · is not known.',
  'WRITTEN   what changed on the device, a second',
  'CAPTURED  what was read of it',
  'STORED    what the repository grew by',
  '',
  'exact       points at every interval while there are writes',
  'coalescing  writes outrun the points, which come later',
  'resync      track was lost: everything is compared while capture goes on',
  'outage      the repository takes nothing; what changes is remembered',
  'absent      the device is gone, and waited for (unreadable: a part of it is)',
];

/** One frame; see {@link DashboardView}. */
export function Dashboard({ view, actions, colour, size }: DashboardProps): ReactElement {
  const { columns, rows } = useTerminalSize(size);
  const { isRawModeSupported } = useStdin();
  const [selected, setSelected] = useState(0);
  const [isHelp, setHelp] = useState(false);
  const count = view.devices.length;
  const current = Math.min(selected, Math.max(0, count - 1));
  useInput(
    (input, key) => {
      if (key.ctrl && input === 'c') return actions.interrupt();
      if (isHelp) return setHelp(false);
      if (input === 'q') return actions.quit();
      if (input === '?' || input === 'h') return setHelp(true);
      if (input === 's' && count > 0) return actions.snapshot(current);
      if (key.downArrow || input === 'j') return setSelected(Math.min(current + 1, count - 1));
      if (key.upArrow || input === 'k') return setSelected(Math.max(current - 1, 0));
    },
    { isActive: isRawModeSupported },
  );
  const shares = shareRows(rows, count, view.alarms.length);
  const c = deviceColumns(columns);
  const right = { align: 'right' } as const;
  const first = Math.max(0, Math.min(current - shares.devices + 1, count - shares.devices));
  const shown = view.devices.slice(first, first + shares.devices);
  const hidden = count - shown.length;
  const sizeText =
    view.repositoryBytes === undefined
      ? ''
      : `  ${formatBytes(view.repositoryBytes)}${view.freeBytes === undefined ? '' : `, ${formatBytes(view.freeBytes)} free`}`;
  const title = `b2 watch  ${view.host}`;
  const up = `${view.time}  up ${formatDuration(view.upSeconds)}`;
  const nameWidth = Math.min(40, Math.max(8, columns - 64));
  return (
    <Box flexDirection="column" width={columns}>
      <Text wrap="truncate">
        <Paint on={colour} bold text={fit(title, columns - up.length - 1)} />
        <Paint on={colour} dim text={` ${up}`} />
      </Text>
      <Text wrap="truncate">
        <Paint
          on={colour}
          text={fit(view.repository, Math.max(10, columns - sizeText.length), {
            keepEnd: true,
          }).trimEnd()}
        />
        <Paint on={colour} text={sizeText} />
      </Text>
      <Text> </Text>
      {isHelp ? (
        <Box flexDirection="column">
          {HELP.slice(0, Math.max(1, rows - 7)).map((line, i) => (
            <Text key={i} wrap="truncate">
              {line === '' ? ' ' : line}
            </Text>
          ))}
        </Box>
      ) : (
        <Box flexDirection="column">
          <Text wrap="truncate">
            <Paint
              on={colour}
              bold
              text={`  ${fit('DEVICE', c.name)} ${fit('STATE', c.state)} ${fit('LAG', c.lag, right)} ${fit('HISTORY', c.spark)} ${fit('WRITTEN', c.rate, right)} ${fit('CAPTURED', c.rate, right)} ${fit('STORED', c.rate, right)}`}
            />
          </Text>
          {shown.map((device, i) => (
            <DeviceLine
              key={device.name}
              device={device}
              columns={c}
              isSelected={first + i === current}
              intervalMs={view.intervalMs}
              colour={colour}
            />
          ))}
          <Text> </Text>
          <Paint
            on={colour}
            bold
            text={`LAST POINTS${hidden > 0 ? ` (${hidden} devices are not shown)` : ''}`}
          />
          {view.points.slice(0, shares.points).map((point) => (
            <PointLine
              key={`${point.device} ${point.id} ${point.time}`}
              point={point}
              nameWidth={nameWidth}
              colour={colour}
            />
          ))}
          {view.points.length === 0 ? <Paint on={colour} dim text="  none yet" /> : undefined}
          <Text> </Text>
          <Paint on={colour} bold text="ALARMS" />
          {view.alarms.slice(0, shares.alarms).map((alarm, i) => (
            <AlarmLine key={i} alarm={alarm} colour={colour} />
          ))}
          {view.alarms.length === 0 ? <Paint on={colour} dim text="  none" /> : undefined}
        </Box>
      )}
      <Text> </Text>
      <Text wrap="truncate">
        <Paint on={colour} bold text={view.message === undefined ? ' ' : view.message} />
      </Text>
      <Text wrap="truncate">
        <Paint on={colour} dim text="s snapshot   ↑↓ select   q quit   ? help" />
      </Text>
    </Box>
  );
}

export interface ShownDashboard {
  /** Draws this from now on. */
  update(view: DashboardView): void;
  /** Gives the terminal back. */
  close(): void;
}

export interface ShowOptions {
  readonly view: DashboardView;
  readonly actions: DashboardActions;
  readonly colour: boolean;
}

const ALTERNATE_SCREEN = '\u001b[?1049h\u001b[H';
const EMPTY_SCREEN = '\u001b[2J\u001b[H';
const NORMAL_SCREEN = '\u001b[?1049l';

/** Takes the terminal (its alternate screen) until it is closed, or the process ends. */
export function showDashboard({ view, actions, colour }: ShowOptions): ShownDashboard {
  const { stdout } = process;
  const giveBack = (): void => void stdout.write(NORMAL_SCREEN);
  stdout.write(ALTERNATE_SCREEN);
  process.once('exit', giveBack);
  const draw = (v: DashboardView): ReactElement => (
    <Dashboard view={v} actions={actions} colour={colour} />
  );
  const app = render(draw(view), { exitOnCtrlC: false, patchConsole: false, maxFps: 10 });
  // The terminal has moved the lines that are there to other places, and one more frame of the old size may come: the next one
  // after that begins on an empty screen.
  let isMoved = false;
  const resized = (): void => {
    isMoved = true;
  };
  stdout.on('resize', resized);
  let closed = false;
  return {
    update(next) {
      if (closed) return;
      if (isMoved) {
        isMoved = false;
        app.clear();
        stdout.write(EMPTY_SCREEN);
      }
      app.rerender(draw(next));
    },
    close() {
      if (closed) return;
      closed = true;
      stdout.off('resize', resized);
      app.clear();
      app.unmount();
      // What the last frame left must not be seen when a terminal without another screen goes on.
      stdout.write(EMPTY_SCREEN);
      process.off('exit', giveBack);
      giveBack();
    },
  };
}
