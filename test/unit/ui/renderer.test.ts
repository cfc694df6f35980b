import { describe, expect, it, vi } from 'vitest';
import type { ProgressEvent } from '../../../src/events.js';
import { progressText } from '../../../src/ui/progress.js';
import { createRenderer, type RendererOptions } from '../../../src/ui/renderer.js';
import { plainStyle } from '../../../src/ui/style.js';
import { CaptureStream } from '../../support/capture-stream.js';
import { ManualClock } from '../../support/manual-clock.js';

function setUp(options: Partial<RendererOptions> = {}) {
  const clock = new ManualClock();
  const stdout = new CaptureStream();
  const stderr = new CaptureStream();
  const renderer = createRenderer({
    stdout,
    stderr,
    json: false,
    quiet: false,
    verbose: false,
    clock,
    stderrStyle: plainStyle,
    canDraw: true,
    ...options,
  });
  return { clock, stdout, stderr, renderer };
}

const progress = (doneBytes: number, phase = 'reading'): ProgressEvent => ({
  type: 'progress',
  phase,
  doneBytes,
  totalBytes: 100 * 2 ** 20,
  rateBytesPerSecond: 2 ** 20,
  etaSeconds: 9,
});

it('words progress', () => {
  expect(progressText(progress(25 * 2 ** 20))).toBe(
    'reading: 25.0 MiB of 100.0 MiB (25.0%), 1.0 MiB/s, 9s left',
  );
  expect(
    progressText({ type: 'progress', phase: 'a\u001b', doneBytes: 5, rateBytesPerSecond: 0 }),
  ).toBe('a\\x1b: 5 B');
  expect(
    progressText({
      type: 'progress',
      phase: 'x',
      doneBytes: 0,
      totalBytes: 0,
      rateBytesPerSecond: 0,
    }),
  ).toBe('x: 0 B of 0 B (100.0%)');
});

describe('for people', () => {
  it('keeps answers on stdout and everything else on stderr', async () => {
    const { stdout, stderr, renderer } = setUp();
    renderer.events({ type: 'note', message: 'chose #5' });
    renderer.events({ type: 'detail', message: 'not shown' });
    renderer.events({ type: 'warning', message: 'lag', hint: 'look at it' });
    renderer.line({ type: 'x' }, 'a line');
    renderer.answer({ a: 1 }, 'the answer');
    renderer.answer(undefined, '');
    renderer.error({ code: 1, message: 'it failed', hint: 'try', details: ['because: x'] });
    await renderer.close();
    expect(stdout.text).toBe('a line\nthe answer\n');
    expect(stderr.lines).toEqual([
      'chose #5',
      'b2: warning: lag',
      '    look at it',
      'b2: it failed',
      '    try',
      '    because: x',
    ]);
  });

  it('is silent in a pipe for half a minute, then says where it is', async () => {
    const { clock, stderr, renderer } = setUp();
    for (let i = 0; i < 65; i += 1) {
      renderer.events(progress(i * 2 ** 20));
      clock.advanceMs(1000);
    }
    await renderer.close();
    expect(stderr.lines.map((line) => line.slice(0, 17))).toEqual([
      'reading: 30.0 MiB',
      'reading: 60.0 MiB',
    ]);
  });

  it('draws a moving line on a terminal and takes it away', async () => {
    const stderr = new CaptureStream(true);
    const { renderer } = setUp({ stderr });
    renderer.events(progress(2 ** 20));
    await vi.waitFor(() => expect(stderr.text).toContain('reading: 1.0 MiB of 100.0 MiB'));
    renderer.events({ type: 'note', message: 'a note' });
    renderer.events(progress(3 * 2 ** 20));
    await renderer.close();
    expect(stderr.text).toContain('a note\n');
    // The cursor is shown again.
    expect(stderr.text.lastIndexOf('\u001b[?25h')).toBeGreaterThan(
      stderr.text.lastIndexOf('\u001b[?25l'),
    );
  });

  it('draws nothing on a terminal that cannot', async () => {
    const stderr = new CaptureStream(true);
    const { clock, renderer } = setUp({ stderr, canDraw: false });
    clock.advanceMs(31_000);
    renderer.events(progress(2 ** 20));
    await renderer.close();
    expect(stderr.lines).toEqual(['reading: 1.0 MiB of 100.0 MiB (1.0%), 1.0 MiB/s, 9s left']);
  });

  it('says less when asked to be quiet, more when asked for details', async () => {
    const quiet = setUp({ quiet: true });
    quiet.renderer.events({ type: 'note', message: 'n' });
    quiet.clock.advanceMs(60_000);
    quiet.renderer.events(progress(1));
    quiet.renderer.events({ type: 'warning', message: 'w' });
    await quiet.renderer.close();
    expect(quiet.stderr.text).toBe('b2: warning: w\n');
    const verbose = setUp({ verbose: true });
    verbose.renderer.events({ type: 'detail', message: 'd' });
    expect(verbose.stderr.text).toBe('d\n');
  });
});

describe('as JSON', () => {
  it('writes a document to stdout and typed lines to stderr', async () => {
    const { stdout, stderr, renderer } = setUp({ json: true });
    renderer.line({ type: 'point' }, 'not shown');
    renderer.answer({ a: 1 }, 'not shown');
    renderer.events({ type: 'note', message: 'n' });
    renderer.events({ type: 'warning', message: 'w', hint: 'h' });
    renderer.error({ code: 4, message: 'no', details: ['stack'] });
    renderer.error({ code: 4, message: 'no', hint: 'h', details: [] });
    await renderer.close();
    expect(stdout.text).toBe('{"type":"point"}\n{"a":1}\n');
    expect(stderr.lines.map((line): unknown => JSON.parse(line))).toEqual([
      { type: 'note', message: 'n' },
      { type: 'warning', message: 'w', hint: 'h' },
      { type: 'error', code: 4, message: 'no' },
      { type: 'error', code: 4, message: 'no', hint: 'h' },
    ]);
  });

  it('thins progress out, keeping the last of each phase', async () => {
    const { clock, stderr, renderer } = setUp({ json: true });
    for (let i = 0; i <= 13; i += 1) {
      renderer.events(progress(i));
      clock.advanceMs(200);
    }
    renderer.events(progress(50, 'writing'));
    clock.advanceMs(100);
    renderer.events(progress(51, 'writing'));
    await renderer.close();
    const seen = stderr.lines.map((line): unknown => (JSON.parse(line) as ProgressEvent).doneBytes);
    expect(seen).toEqual([0, 5, 10, 13, 50, 51]);
  });
});

describe('when stdout cannot be written', () => {
  it('tells a reader that left from a full disk, once', async () => {
    for (const [error, expected] of [
      [Object.assign(new Error('write EPIPE'), { code: 'EPIPE' }), 'closed'],
      [Object.assign(new Error('ENOSPC: full'), { code: 'ENOSPC' }), { reason: 'ENOSPC: full' }],
    ] as const) {
      const onOutputFailure = vi.fn();
      const { stdout, renderer } = setUp({ onOutputFailure });
      expect(renderer.outputFailure()).toBeUndefined();
      stdout.fail = error;
      await expect(renderer.bytes(Buffer.from('x'))).rejects.toMatchObject({ code: 3 });
      renderer.line({ type: 'x' }, 'more');
      await renderer.close();
      expect(renderer.outputFailure()).toEqual(expected);
      expect(onOutputFailure).toHaveBeenCalledTimes(1);
    }
  });
});
