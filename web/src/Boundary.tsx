import { Component, type ReactNode } from 'react';

interface Props {
  instead: ReactNode;
  children: ReactNode;
}

/** What cannot be shown takes nothing else with it: something is shown instead. */
export class Boundary extends Component<Props, { hasFailed: boolean }> {
  override state = { hasFailed: false };

  static getDerivedStateFromError() {
    return { hasFailed: true };
  }

  override render() {
    return this.state.hasFailed ? this.props.instead : this.props.children;
  }
}
