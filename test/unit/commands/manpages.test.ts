import { expect, it } from 'vitest';
import { manPages } from '../../../src/commands/manpages.js';
import { sampleCommands } from '../../support/sample-commands.js';

const pages = manPages(
  '1.2.3',
  sampleCommands(() => Promise.resolve({ data: undefined })),
);

it('makes a page for b2 and for each first word', () => {
  expect([...pages.keys()]).toEqual(['b2.1', 'b2-restore.1', 'b2-key.1', 'b2-watch.1']);
  expect(pages.get('b2.1')).toContain('.BR b2\\-restore (1)\nBring a volume back.');
});

it('describes every argument, option, example and exit code', () => {
  const page = pages.get('b2-restore.1') ?? '';
  for (const text of [
    'b2\\-restore \\- bring a volume back',
    '\\fB\\-\\-chunk\\-size\\fR \\fISIZE\\fR',
    '\\fB\\-t\\fR, \\fB\\-\\-tag\\fR \\fIT\\fR',
    'Can be given several times.',
    'Image format (raw, qcow2; default raw).',
    '\\fBb2 restore web1/sda /dev/sdb \\-\\-at "5m ago"\\fR\nAs five minutes ago.',
    '\\fB4\\fR\nNo such point.',
    '\\fB130\\fR',
  ]) {
    expect(page).toContain(text);
  }
});

it('keeps text from being taken for roff', () => {
  const page = pages.get('b2-restore.1') ?? '';
  expect(page).toContain('\n\\&.dot first: \\e and \\- and "quotes".\n');
  // Every line that starts with a dot or an apostrophe is one of ours.
  const requests = page.split('\n').filter((line) => /^['.]/.test(line));
  for (const line of requests) expect(line).toMatch(/^\.(\\"|TH|SH|SS|TP|PP|HP|BR)( |$)/);
});

it('puts the commands of a group on one page', () => {
  const page = pages.get('b2-key.1') ?? '';
  expect(page).toContain('.SH "B2 KEY ADD"');
  expect(page).toContain('.SH "B2 KEY LIST"');
  expect(page).toContain('.SS EXIT STATUS');
});
